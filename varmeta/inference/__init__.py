"""How it is learned: the strategies, the differentiable inner problem, and the outer loop."""
