"""The report as one HTML file: read what an output folder holds, draw it, fill the template."""
