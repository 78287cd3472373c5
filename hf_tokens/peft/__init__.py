"""The chassis: the PEFT type, where the methods of an adapter go, and the tuner."""
