//! The voices of the fleet. Each yields [`Observation`](crate::fleet::Observation)s into one channel and knows nothing
//! of what becomes of them.

pub mod etcd;
mod events;
pub mod files;
pub mod kubernetes;
pub mod nats;
pub(crate) mod owners;
mod patience;
pub(crate) mod registry;
pub(crate) mod zmq;
