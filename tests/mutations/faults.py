"""Plausible faults, each one edit of one file, with the tests that a developer of that file runs.

tests/mutations/plant.py plants them one at a time and counts how many the tests catch. A fault is
small, keeps the program running, and would cost someone a run: what a tired person types, or what a
change elsewhere forgets.
"""

from mutations import losses, networks, runs, surroundings
from mutations.fault import Fault

# All tables of these files, so that none is left out by mistake.
FAULTS: list[Fault] = [
    fault
    for module in (networks, losses, runs, surroundings)
    for table in vars(module).values()
    if isinstance(table, list)
    for fault in table
]
