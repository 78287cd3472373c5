"""The world of Diffusers: steps, guidance and schedules."""
