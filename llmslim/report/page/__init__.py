"""Reports as pages: one HTML file, a comparison, and what shells and notebooks show."""
