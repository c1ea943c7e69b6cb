"""Training objectives: each is an Objective, a record of its loss, its bound and its mask
(objective.py).
"""
