//! The node daemon: the replicated log, and what a node does with it.
//!
//! ```text
//!  node        uninitialised or member; what the admin API works with
//!  ├ raft, net         the log; the one place where nodes connect
//!  ├ trust             who is at the other end: certificates, the door, the issuing key
//!  ├ heartbeat, leader the node's lease, from both sides
//!  ├ agent             makes this host agree with the log
//!  │  ├ monitors, broker, machine_file, process   its means
//!  │  ├ confine, cgroups   what a monitor cannot do and cannot use up
//!  │  └ permit         the one way by which a guest runs
//!  ├ controllers       what the leader does by itself
//!  ├ check, join       whether this host is fit to be a node, before it joins and after
//!  └ peer_service      what other nodes ask
//! ```
//! `unsafe` stands in the module that says `#![allow(unsafe_code)]`, one ioctl of /dev/kvm; nowhere else.

#![deny(unsafe_code)]

pub mod admin;
pub mod agent;
pub mod broker;
pub mod cgroups;
pub mod check;
pub mod clock;
pub mod config;
pub mod confine;
pub mod controllers;
pub mod heartbeat;
pub mod join;
mod late;
pub mod leader;
pub mod machine_file;
pub mod member;
pub mod metrics;
pub mod monitors;
pub mod net;
pub mod node;
pub mod peer_service;
pub mod permit;
pub mod process;
pub mod raft;
pub mod report;
pub mod telemetry;
pub mod trust;
pub mod volumes;
