"""Similar images: encoders, a store of embeddings, exact and approximate search."""
