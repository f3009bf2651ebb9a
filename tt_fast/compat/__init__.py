"""Old interfaces: gym's and D4RL's environments, the original code's own scripts."""
