//! Rules for trust: the certificate authority, the tokens, the other clusters, and the way in.
//!
//! Where a time decides (a token's end) it is compared with the entry's own `at_ms`, so that every replica
//! decides alike. No event and no refusal carries a secret's hash.

#[cfg(test)]
mod tests;

use super::cluster::NODES_MAX;
use super::{Applied, Entry, name_taken};
use crate::FIRST_NODE;
use crate::command::{Outcome, Rejection};
use crate::event::{Object, Severity};
use crate::ids::{Name, NodeId};
use crate::state::{ClusterState, Liveness, NodeRole};
use crate::trust::{
    ACCESS_TOKENS_MAX, AccessToken, Authority, Issuing, JOIN_TOKENS_MAX, JoinToken, JoinedAs,
    PEM_BYTES_MAX, Root, SEALED_KEY_BYTES_MAX, Sha256, TAGS_MAX, TOKEN_ID_BYTES_MAX,
    TRUSTED_CLUSTERS_MAX, TrustRefusal, TrustedCluster,
};

/// The longest address of a node that joins, bytes: a name of 253 and a port.
const ADDRESS_BYTES_MAX: usize = 259;

impl From<TrustRefusal> for Rejection {
    fn from(refusal: TrustRefusal) -> Rejection {
        Rejection::Trust(refusal)
    }
}

impl ClusterState {
    pub(super) fn found_trust(
        &mut self,
        entry: &mut Entry<'_>,
        authority: &Authority,
        first_node_key: Sha256,
    ) -> Applied {
        match &self.trust.authority {
            Some(known) if known == authority => return Ok(Outcome::Nothing),
            Some(_) => return Err(TrustRefusal::AlreadyFounded.into()),
            None => {}
        }
        let [root] = authority.roots.as_slice() else {
            return Err(bad_authority("it begins with one root"));
        };
        check_roots(&authority.roots)?;
        check_issuing(&authority.issuing)?;
        self.node(authority.issuing.made_by)?;
        self.node_mut(FIRST_NODE)?.key = Some(first_node_key);
        let detail = format!("certificates lead to the root {}", root.fingerprint);
        self.trust.authority = Some(authority.clone());
        self.note_trust(entry, "trust.founded", detail);
        Ok(Outcome::Nothing)
    }

    pub(super) fn create_join_token(
        &mut self,
        entry: &mut Entry<'_>,
        id: &str,
        token: JoinToken,
    ) -> Applied {
        check_token_id(id)?;
        if let Some(known) = self.trust.join_tokens.get(id) {
            let same = known.node == token.node
                && known.role == token.role
                && known.secret_hash.matches(&token.secret_hash)
                && known.expires_at_ms == token.expires_at_ms;
            return taken_unless(same, id);
        }
        if token.expires_at_ms <= entry.at_ms {
            return Err(TrustRefusal::ExpiredAtOnce.into());
        }
        if self.node_named(&token.node).is_some() {
            return Err(name_taken("node", &token.node));
        }
        let stands = self.trust.join_tokens.iter().find(|(_, known)| {
            known.node == token.node && known.used_by.is_none() && known.expires_at_ms > entry.at_ms
        });
        if let Some((id, _)) = stands {
            return Err(TrustRefusal::JoinTokenStands {
                node: token.node,
                id: id.clone(),
            }
            .into());
        }
        if self.trust.join_tokens.len() >= JOIN_TOKENS_MAX {
            self.forget_spent_join_tokens(entry.at_ms);
        }
        room_for(
            "join tokens (revoke some: clusterctl join-tokens list)",
            self.trust.join_tokens.len(),
            JOIN_TOKENS_MAX,
        )?;
        let detail = format!(
            "{} may join as {} by the token {id}",
            token.node,
            token.role.as_str()
        );
        self.trust.join_tokens.insert(id.to_owned(), token);
        self.note_trust(entry, "join-token.made", detail);
        Ok(Outcome::Nothing)
    }

    /// Forgets what lets nobody in any more: expired tokens, and used ones unless their node, which has not
    /// spoken yet, may still ask again for an answer that was lost.
    fn forget_spent_join_tokens(&mut self, at_ms: u64) {
        let nodes = &self.nodes;
        self.trust.join_tokens.retain(|_, token| {
            token.expires_at_ms > at_ms
                && token.used_by.as_ref().is_none_or(|used| {
                    nodes
                        .get(&used.node)
                        .is_some_and(|node| node.liveness == Liveness::Joining)
                })
        });
    }

    pub(super) fn revoke_join_token(&mut self, entry: &mut Entry<'_>, id: &str) -> Applied {
        let Some(token) = self.trust.join_tokens.remove(id) else {
            return Err(TrustRefusal::UnknownJoinToken { id: id.to_owned() }.into());
        };
        let detail = format!("the token {id} for {} lets nobody in any more", token.node);
        self.note_trust(entry, "join-token.revoked", detail);
        Ok(Outcome::Nothing)
    }

    /// The join token `id` for a node called `name`: that it is one, of that secret, for that name, in its time.
    /// Whether it was used is the caller's to look at.
    fn join_token(
        &self,
        (id, secret_hash): (&str, &Sha256),
        name: &Name,
        at_ms: u64,
    ) -> Result<&JoinToken, TrustRefusal> {
        let token = self
            .trust
            .join_tokens
            .get(id)
            .filter(|token| token.secret_hash.matches(secret_hash))
            .ok_or(TrustRefusal::JoinTokenWrong)?;
        let node = token.node.clone();
        if node != *name {
            let name = name.clone();
            return Err(TrustRefusal::JoinTokenForOther { node, name });
        }
        if token.expires_at_ms <= at_ms {
            return Err(TrustRefusal::JoinTokenExpired { node });
        }
        Ok(token)
    }

    /// Whether a node called `name` would be let in now by the join token `id`, and as what. Nothing is changed:
    /// the token stays good.
    ///
    /// # Errors
    /// Why it would not be let in; what of a [`Command::JoinNode`](crate::Command::JoinNode) depends on its key
    /// and address is not looked at.
    pub fn would_join(
        &self,
        id: &str,
        secret_hash: &Sha256,
        name: &Name,
        at_ms: u64,
    ) -> Result<NodeRole, Rejection> {
        let token = self.join_token((id, secret_hash), name, at_ms)?;
        if token.used_by.is_some() {
            let node = token.node.clone();
            return Err(TrustRefusal::JoinTokenUsed { node }.into());
        }
        if self.node_named(name).is_some() {
            return Err(name_taken("node", name));
        }
        room_for("nodes", self.nodes.len(), NODES_MAX)?;
        Ok(token.role)
    }

    pub(super) fn join_node(
        &mut self,
        entry: &mut Entry<'_>,
        (id, secret_hash): (&str, &Sha256),
        name: &Name,
        address: &str,
        key: Sha256,
    ) -> Applied {
        let token = self.join_token((id, secret_hash), name, entry.at_ms)?;
        let node = token.node.clone();
        if let Some(used) = &token.used_by {
            // The same node asking again (its first answer was lost) is let in as who it is.
            let same = used.key.matches(&key)
                && self.nodes.get(&used.node).is_some_and(|known| {
                    known.address == address && known.liveness == Liveness::Joining
                });
            return if same {
                Ok(Outcome::Node(used.node))
            } else {
                Err(TrustRefusal::JoinTokenUsed { node }.into())
            };
        }
        if self.node_named(name).is_some() {
            return Err(name_taken("node", name));
        }
        if let Some(other) = self.nodes.values().find(|node| node.key == Some(key)) {
            let node = other.name.clone();
            return Err(TrustRefusal::KeyTaken { node }.into());
        }
        if address.len() > ADDRESS_BYTES_MAX {
            return Err(too_large("address (bytes)", ADDRESS_BYTES_MAX));
        }
        room_for("nodes", self.nodes.len(), NODES_MAX)?;
        let role = token.role;
        let id_of_node = NodeId(entry.index.0);
        self.insert_node(id_of_node, name, address, role, Some(key));
        if let Some(token) = self.trust.join_tokens.get_mut(id) {
            token.used_by = Some(JoinedAs {
                node: id_of_node,
                key,
                at_ms: entry.at_ms,
            });
        }
        self.note(
            entry,
            Severity::Info,
            vec![Object::Node(id_of_node)],
            "node.added",
            format!(
                "{name} at {address} as {}, by the token {id}",
                role.as_str()
            ),
            None,
        );
        Ok(Outcome::Node(id_of_node))
    }

    pub(super) fn create_access_token(
        &mut self,
        entry: &mut Entry<'_>,
        id: &str,
        token: AccessToken,
    ) -> Applied {
        check_token_id(id)?;
        if let Some(known) = self.trust.access_tokens.get(id) {
            let same = known.user == token.user
                && known.role == token.role
                && known.tags == token.tags
                && known.secret_hash.matches(&token.secret_hash)
                && known.expires_at_ms == token.expires_at_ms;
            return taken_unless(same, id);
        }
        if token.expires_at_ms <= entry.at_ms {
            return Err(TrustRefusal::ExpiredAtOnce.into());
        }
        if token.tags.len() > TAGS_MAX {
            return Err(too_large("tags of a token", TAGS_MAX));
        }
        let tokens = &mut self.trust.access_tokens;
        if tokens.len() >= ACCESS_TOKENS_MAX {
            tokens.retain(|_, known| known.expires_at_ms > entry.at_ms);
        }
        room_for(
            "access tokens (revoke some: clusterctl token list)",
            tokens.len(),
            ACCESS_TOKENS_MAX,
        )?;
        let tags: Vec<&str> = token.tags.iter().map(Name::as_str).collect();
        let detail = format!(
            "{} is {} by the token {id}, for {}",
            token.user,
            token.role.as_str(),
            if tags.is_empty() {
                "everything".to_owned()
            } else {
                format!("machines tagged {}", tags.join(", "))
            }
        );
        tokens.insert(id.to_owned(), token);
        self.note_trust(entry, "access-token.made", detail);
        Ok(Outcome::Nothing)
    }

    pub(super) fn revoke_access_token(&mut self, entry: &mut Entry<'_>, id: &str) -> Applied {
        let Some(token) = self.trust.access_tokens.remove(id) else {
            return Err(TrustRefusal::UnknownAccessToken { id: id.to_owned() }.into());
        };
        let detail = format!("the token {id} of {} is worth nothing any more", token.user);
        self.note_trust(entry, "access-token.revoked", detail);
        Ok(Outcome::Nothing)
    }

    pub(super) fn rotate_authority(
        &mut self,
        entry: &mut Entry<'_>,
        expects: u64,
        roots: &[Root],
        issuing: &Issuing,
    ) -> Applied {
        let Some(known) = &self.trust.authority else {
            return Err(TrustRefusal::NotFounded.into());
        };
        if known.roots == roots && known.issuing == *issuing {
            return Ok(Outcome::Nothing);
        }
        if known.issuing.generation != expects {
            return Err(TrustRefusal::AuthorityMoved {
                expected: expects,
                is: known.issuing.generation,
            }
            .into());
        }
        check_roots(roots)?;
        let trusted = |root: &Root| {
            let mut trusted = known.roots.iter();
            trusted.find(|old| old.fingerprint == root.fingerprint)
        };
        if roots.iter().all(|root| trusted(root).is_none()) {
            return Err(bad_authority(
                "one of its roots must be trusted already, or no node would follow; add the new root beside the old one first",
            ));
        }
        let changed = |root: &Root| {
            trusted(root).is_some_and(|old| old.certificate_pem != root.certificate_pem)
        };
        if roots.iter().any(changed) {
            return Err(bad_authority("a root that stays keeps its certificate"));
        }
        let (kind, detail) = if issuing.generation == expects {
            let added = roots.len() == 2 && known.roots.len() == 1 && roots[0] == known.roots[0];
            if !added || *issuing != known.issuing {
                return Err(bad_authority(
                    "within one generation a second root can be put behind the only one, and nothing else",
                ));
            }
            ("ca.root-added", "a second root is trusted".to_owned())
        } else if Some(issuing.generation) == expects.checked_add(1) {
            check_issuing(issuing)?;
            self.node(issuing.made_by)?;
            let detail = format!("generation {} signs certificates", issuing.generation);
            ("ca.rotated", detail)
        } else {
            return Err(bad_authority(
                "the next issuing CA is of the next generation; look: clusterctl cluster ca show",
            ));
        };
        self.trust.authority = Some(Authority {
            roots: roots.to_vec(),
            issuing: issuing.clone(),
        });
        self.note_trust(entry, kind, detail);
        Ok(Outcome::Nothing)
    }

    pub(super) fn retire_root(&mut self, entry: &mut Entry<'_>, fingerprint: &Sha256) -> Applied {
        let Some(authority) = &mut self.trust.authority else {
            return Err(TrustRefusal::NotFounded.into());
        };
        let roots = &mut authority.roots;
        if !roots.iter().any(|root| root.fingerprint == *fingerprint) {
            let fingerprint = *fingerprint;
            return Err(TrustRefusal::UnknownRoot { fingerprint }.into());
        }
        if roots.len() == 1 {
            return Err(TrustRefusal::OnlyRoot.into());
        }
        roots.retain(|root| root.fingerprint != *fingerprint);
        let detail = format!("the root {fingerprint} is not trusted any more");
        self.note_trust(entry, "ca.root-retired", detail);
        Ok(Outcome::Nothing)
    }

    pub(super) fn trust_cluster(
        &mut self,
        entry: &mut Entry<'_>,
        name: &Name,
        cluster: &TrustedCluster,
    ) -> Applied {
        match self.trust.clusters.get(name) {
            Some(known) if known == cluster => return Ok(Outcome::Nothing),
            Some(_) => {
                let name = name.clone();
                return Err(TrustRefusal::ClusterNameTaken { name }.into());
            }
            None => {}
        }
        let mut others = self.trust.clusters.iter();
        if let Some((other, _)) = others.find(|(_, known)| known.fingerprint == cluster.fingerprint)
        {
            let name = other.clone();
            return Err(TrustRefusal::RootTrustedAs { name }.into());
        }
        if cluster.root_pem.len() > PEM_BYTES_MAX {
            return Err(too_large("certificate (bytes)", PEM_BYTES_MAX));
        }
        room_for(
            "trusted clusters (remove some: clusterctl cluster trust list)",
            self.trust.clusters.len(),
            TRUSTED_CLUSTERS_MAX,
        )?;
        self.trust.clusters.insert(name.clone(), cluster.clone());
        let detail = format!(
            "machines of {name} may come here: its root is {}",
            cluster.fingerprint
        );
        self.note_trust(entry, "cluster.trusted", detail);
        Ok(Outcome::Nothing)
    }

    pub(super) fn distrust_cluster(&mut self, entry: &mut Entry<'_>, name: &Name) -> Applied {
        if self.trust.clusters.remove(name).is_none() {
            let name = name.clone();
            return Err(TrustRefusal::UnknownCluster { name }.into());
        }
        let detail = format!("machines of {name} may not come here any more");
        self.note_trust(entry, "cluster.distrusted", detail);
        Ok(Outcome::Nothing)
    }

    fn note_trust(&mut self, entry: &mut Entry<'_>, kind: &str, detail: String) {
        let objects = vec![Object::Cluster];
        self.note(entry, Severity::Info, objects, kind, detail, None);
    }
}

fn bad_authority(problem: &str) -> Rejection {
    let problem = problem.to_owned();
    TrustRefusal::BadAuthority { problem }.into()
}

fn too_large(what: &str, max: usize) -> Rejection {
    Rejection::TooLarge {
        what: what.to_owned(),
        max: max as u64,
    }
}

/// Whether there is room for one more; `what` names them and says how to make room.
fn room_for(what: &str, count: usize, max: usize) -> Result<(), Rejection> {
    if count < max {
        Ok(())
    } else {
        Err(too_large(&format!("the number of {what}"), max))
    }
}

/// Making the same token again is done already; another token under its id is not.
fn taken_unless(same: bool, id: &str) -> Applied {
    if same {
        Ok(Outcome::Nothing)
    } else {
        Err(TrustRefusal::TokenIdTaken { id: id.to_owned() }.into())
    }
}

fn check_token_id(id: &str) -> Result<(), Rejection> {
    let plain = |b: u8| b.is_ascii_alphanumeric() || b == b'-' || b == b'_';
    if id.is_empty() || id.len() > TOKEN_ID_BYTES_MAX || !id.bytes().all(plain) {
        let max = TOKEN_ID_BYTES_MAX as u64;
        return Err(TrustRefusal::BadTokenId { max }.into());
    }
    Ok(())
}

fn check_roots(roots: &[Root]) -> Result<(), Rejection> {
    match roots {
        [_] => {}
        [old, new] if old.fingerprint != new.fingerprint => {}
        _ => return Err(bad_authority("it has one root, or two different ones")),
    }
    for root in roots {
        if root.certificate_pem.len() > PEM_BYTES_MAX {
            return Err(too_large("certificate (bytes)", PEM_BYTES_MAX));
        }
        if root.sealed_key.len() > SEALED_KEY_BYTES_MAX {
            return Err(too_large("sealed key (bytes)", SEALED_KEY_BYTES_MAX));
        }
    }
    Ok(())
}

fn check_issuing(issuing: &Issuing) -> Result<(), Rejection> {
    if issuing.certificate_pem.len() > PEM_BYTES_MAX {
        return Err(too_large("certificate (bytes)", PEM_BYTES_MAX));
    }
    Ok(())
}
