"""Pictures and pages about runs, classifiers, the testbed and comparisons."""
