"""Devices and processes: hardware, meshes and shardings, compiler flags, and how processes meet and
stop.
"""
