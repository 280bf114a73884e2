"""The machine beneath: processes, devices, files, signals, random numbers."""
