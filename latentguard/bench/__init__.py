"""`python -m latentguard.bench`: what this package costs beside plain transformers and its peers, as ratios. Knows no experiment."""
