"""The training study: networks trained by each method, on images, and what a step costs by each."""
