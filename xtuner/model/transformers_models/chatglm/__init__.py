"""ChatGLM2 and ChatGLM3, and GLM-4 as its first folders have it (Du et al., GLM, 2022)."""
