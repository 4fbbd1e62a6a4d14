"""What a training loop uses: schedules, accumulation, parameter groups."""
