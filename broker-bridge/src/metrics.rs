//! What every broker measures.
