"""Devices and processes: meshes and shardings, hardware, compiler flags, and how processes meet and
stop.
"""
