"""Cards of a project, its data and its models: what people say, and what Photon knows. No torch."""
