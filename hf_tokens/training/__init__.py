"""The world of trainers: schedules and losses."""
