"""The commands of `mimic-el`: a file for each, the options that they share, and the files that they read."""
