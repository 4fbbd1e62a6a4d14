"""What a budget's plan is expected to cost, beside what it costs."""
