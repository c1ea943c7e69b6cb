"""What is compiled and run at every step: the train step, the state that it advances, the
optimizer.
"""
