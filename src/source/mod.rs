//! The voices of the fleet. Each yields [`Observation`](crate::fleet::Observation)s into one channel and knows nothing
//! of what becomes of them.

mod listen;
pub mod nats;
mod scrape;
