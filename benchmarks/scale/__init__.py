"""What does the pass itself cost: in steps of the model, in memory, and as models grow?"""
