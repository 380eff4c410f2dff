"""What several tests need, by the folder of the tests: unit, exact, runs, repo."""
