"""What every benchmark needs to run stages and to report: stages, comparisons, pages, drawing."""
