"""The commands of `mimic-el`: a module for each, what their options have in common, and the files that they read."""
