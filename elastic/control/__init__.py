"""Decides: which world forms next and why. Pure: no I/O, no clock, no framework; `now` is an argument."""
