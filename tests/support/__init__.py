"""Building blocks of the tests: small runs, learners that need no model, swarms in memory and in processes."""
