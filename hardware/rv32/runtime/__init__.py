"""The program's C sources, which every export copies."""
