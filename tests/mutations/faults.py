"""Plausible faults, each one edit of one file, with the tests that a developer of that file runs.

tests/mutations/plant.py plants them one at a time and counts how many the tests catch. A fault is
small, keeps the program running, and would cost someone a run: what a tired person types, or what a
change elsewhere forgets.
"""

from mutations import losses, networks, runs, surroundings
from mutations.fault import Fault

FAULTS: list[Fault] = [
    *networks.FAULTS,
    *losses.FAULTS,
    *runs.FAULTS,
    *surroundings.FAULTS,
]
