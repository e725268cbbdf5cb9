"""The planner: which configuration of the engine serves this traffic best on these devices, and why. No torch."""
