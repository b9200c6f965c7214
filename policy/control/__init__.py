"""From observations to actions: when to plan and what to execute, in simulated time or in real time."""
