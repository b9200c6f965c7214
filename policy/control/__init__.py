"""From observations to actions: when to plan, what to execute, in simulated time or against the clock."""
