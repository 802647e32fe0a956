"""What the commands print: tables, sparklines and pictures, in colour where the console has it, legible without."""
