"""Many runs: plans, jobs, tables, figures and pages. One run knows nothing of this package."""
