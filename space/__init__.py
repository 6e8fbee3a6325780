"""The page: linking in a browser, as a Hugging Face Space or on one's own machine (`mimic-el demo`)."""
