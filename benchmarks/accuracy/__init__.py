"""What does replacing blocks cost in accuracy, and what does it save? Real data, several seeds."""
