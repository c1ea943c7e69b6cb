"""What a config needs on devices that need not be present: estimates, searches and compiled
programs.
"""
