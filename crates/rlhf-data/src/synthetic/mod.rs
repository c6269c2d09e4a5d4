//! Data that a model writes: new instructions by Self-Instruct, better answers by critique and revision.
//!
//! Invariant: what is asked is a function of the seed, the input and the answers before; so with the answers kept
//! ([`Kept`]) a second run asks nothing twice and ends the same. Who answers is behind [`Author`]; nothing here knows
//! of models or of the net.

pub mod author;
pub mod critique;
pub mod rouge;
pub mod self_instruct;

pub use author::{Ask, Author, Kept};
