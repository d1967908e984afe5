"""The transformer with stochastic early exits."""
