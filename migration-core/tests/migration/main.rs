//! Whole migrations between two machines without a hypervisor.

mod cuts;
mod door;
mod fake;
mod rig;
mod tls;
mod whole;
