//! A cluster's trust in memory alone: for measurements and tests of what lies below a whole node.

use std::collections::BTreeMap;

use cluster_model::{NodeId, NodeRole};

use super::authority::{IssuingKey, RootKey, identity, new_key};
use super::keeper::{Keeper, KeeperError, Papers};
use super::sealed::RecoveryKey;

/// A certificate authority that nobody else believes.
#[derive(Debug)]
pub struct Authority {
    issuing: IssuingKey,
    cluster: String,
}

impl Authority {
    /// A new one.
    ///
    /// # Errors
    /// See [`KeeperError`].
    pub fn new() -> Result<Authority, KeeperError> {
        let now_ms = now_ms();
        let recovery = RecoveryKey::new().map_err(super::authority::AuthorityError::from)?;
        let root = RootKey::make(&recovery, now_ms)?;
        Ok(Authority {
            issuing: root.issue(1, NodeId(1), now_ms)?,
            cluster: uuid::Uuid::new_v4().to_string(),
        })
    }

    /// What a node of this cluster shows.
    ///
    /// # Errors
    /// See [`KeeperError`].
    pub fn credentials(&self, node: NodeId) -> Result<proto::tls::Credentials, KeeperError> {
        let key = new_key()?;
        let identity = identity(&self.cluster, node, NodeRole::Voter);
        let public = super::authority::PublicKey::of(&key)?;
        let certified = self.issuing.certify(&identity, &public, now_ms())?;
        let pem = key.serialize_pem();
        Ok(proto::tls::Credentials::from_pem(
            &certified.chain_pem,
            &pem,
        )?)
    }

    /// The papers of a node.
    ///
    /// # Errors
    /// See [`KeeperError`].
    pub fn keeper(&self, node: NodeId, role: NodeRole) -> Result<Keeper, KeeperError> {
        let keeper = Keeper::with_key(None, new_key()?);
        let identity = identity(&self.cluster, node, role);
        let certified = self
            .issuing
            .certify(&identity, &keeper.public_key()?, now_ms())?;
        keeper.install(Papers {
            cluster: self.cluster.clone(),
            chain_pem: certified.chain_pem,
            ends_at_ms: certified.ends_at_ms,
            generation: certified.generation,
            roots: vec![self.issuing.root_pem.clone()],
            foreign: BTreeMap::new(),
        })?;
        Ok(keeper)
    }
}

fn now_ms() -> u64 {
    proto::clock::realtime_ns() / 1_000_000
}
