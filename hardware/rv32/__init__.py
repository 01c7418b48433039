"""A model as a program for plain RV32 cores: its device layout, its files, the compiler and the simulator."""
