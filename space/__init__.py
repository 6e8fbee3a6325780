"""The page: linking in a browser, as a Hugging Face Space or on your own machine (`mimic-el demo`)."""
