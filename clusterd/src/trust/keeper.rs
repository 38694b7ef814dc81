//! What a node keeps of trust on its disk, and the TLS that follows from it.

use std::collections::{BTreeMap, HashMap};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use cluster_model::trust::{Issuing, Trust};
use cluster_model::{ClusterState, Name, NodeId};
use proto::tls::{self, Anchors, Credentials, Expect, Identity};
use rcgen::KeyPair;
use rustls::{ClientConfig, ServerConfig};
use serde::{Deserialize, Serialize};
use tokio::sync::watch;

use super::authority::{AuthorityError, Certified, IssuingKey, PublicKey, new_key};
use super::sealed::{SealError, SealingKey, hex, unhex};

/// What binds a sealed issuing key to its use.
const ISSUING_CONTEXT: &str = "baton issuing key";
/// The file of the key that signs now.
const ISSUING: &str = "issuing.json";
/// The file of one that was made here and is not in the log yet.
const NEXT: &str = "issuing-next.json";

/// Why this node's papers cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum KeeperError {
    /// The files.
    #[error("cannot use {}: {source}", path.display())]
    File {
        /// Which.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A file says something else than it should.
    #[error("{} is damaged: {why}; remove this node from its cluster and let it join anew", path.display())]
    Damaged {
        /// Which.
        path: PathBuf,
        /// How.
        why: String,
    },
    /// Keys or certificates.
    #[error(transparent)]
    Authority(#[from] AuthorityError),
    /// TLS refuses them.
    #[error(transparent)]
    Tls(#[from] tls::TlsError),
    /// There are none yet.
    #[error("this node has no certificate yet; it belongs to no cluster")]
    NoPapers,
}

/// A node's papers as they lie on its disk. No secret is among them.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Papers {
    /// The cluster's id.
    pub cluster: String,
    /// Its certificate and those above it.
    pub chain_pem: String,
    /// When it ends, ms since the Unix epoch.
    pub ends_at_ms: u64,
    /// Of the issuing CA that made it.
    pub generation: u64,
    /// The roots that this node believes.
    pub roots: Vec<String>,
    /// Roots of other clusters, by the names they are trusted under.
    #[serde(default)]
    pub foreign: BTreeMap<Name, String>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct SealedIssuing {
    issuing: Issuing,
    root_pem: String,
    sealed_key: String,
}

/// What TLS uses now.
#[derive(Debug)]
struct Current {
    papers: Papers,
    identity: Identity,
    credentials: Credentials,
    anchors: Anchors,
    server: Arc<ServerConfig>,
}

/// This node's trust. Clones are the same.
#[derive(Clone, Debug)]
pub struct Keeper {
    inner: Arc<Inner>,
}

struct Inner {
    /// `None`: nothing is kept (measurements and tests of the network alone).
    folder: Option<PathBuf>,
    key: KeyPair,
    current: watch::Sender<Option<Arc<Current>>>,
    issuing: Mutex<Option<Arc<IssuingKey>>>,
    /// Made here for a rotation, until the log has taken it.
    next: Mutex<Option<Arc<IssuingKey>>>,
    /// Which node answers where, as the log says.
    addresses: Mutex<Arc<HashMap<String, NodeId>>>,
}

impl std::fmt::Debug for Inner {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Inner")
            .field("folder", &self.folder)
            .field("key", &"(secret)")
            .finish_non_exhaustive()
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    // What lies behind these locks is replaced whole.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Keeper {
    /// Opens what `data_dir` has; a key is made when there is none.
    ///
    /// # Errors
    /// See [`KeeperError`].
    pub fn open(data_dir: &Path) -> Result<Keeper, KeeperError> {
        let folder = data_dir.join("trust");
        make_private(&folder)?;
        let key_path = folder.join("node.key");
        let key = match read(&key_path)? {
            Some(pem) => KeyPair::from_pem(&pem).map_err(|_| KeeperError::Damaged {
                path: key_path,
                why: "there is no key in it".into(),
            })?,
            None => {
                let key = new_key()?;
                write(&key_path, key.serialize_pem().as_bytes())?;
                key
            }
        };
        let keeper = Keeper::with_key(Some(folder.clone()), key);
        let papers: Option<Papers> = read_json(&folder.join("papers.json"))?;
        if let Some(papers) = papers {
            keeper.publish(papers)?;
        }
        *lock(&keeper.inner.issuing) = keeper.open_issuing(ISSUING)?.map(Arc::new);
        *lock(&keeper.inner.next) = keeper.open_issuing(NEXT)?.map(Arc::new);
        Ok(keeper)
    }

    fn open_issuing(&self, name: &str) -> Result<Option<IssuingKey>, KeeperError> {
        let Some(folder) = &self.inner.folder else {
            return Ok(None);
        };
        let path = folder.join(name);
        let Some(sealed) = read_json::<SealedIssuing>(&path)? else {
            return Ok(None);
        };
        let damaged = |error: SealError| KeeperError::Damaged {
            path: path.clone(),
            why: error.to_string(),
        };
        let bytes = unhex(&sealed.sealed_key).ok_or_else(|| damaged(SealError))?;
        let der = self
            .sealing()
            .open(ISSUING_CONTEXT, &bytes)
            .map_err(damaged)?;
        let key = IssuingKey::from_parts(sealed.issuing, sealed.root_pem, der)?;
        Ok(Some(key))
    }

    fn seal_issuing(&self, name: &str, key: &IssuingKey) -> Result<(), KeeperError> {
        let Some(folder) = &self.inner.folder else {
            return Ok(());
        };
        let sealed = self
            .sealing()
            .seal(ISSUING_CONTEXT, &key.key_der())
            .map_err(AuthorityError::from)?;
        let text = serde_json::to_vec_pretty(&SealedIssuing {
            issuing: key.issuing.clone(),
            root_pem: key.root_pem.clone(),
            sealed_key: hex(&sealed),
        })
        .unwrap_or_default();
        write(&folder.join(name), &text)
    }

    fn remove(&self, name: &str) -> Result<(), KeeperError> {
        let Some(folder) = &self.inner.folder else {
            return Ok(());
        };
        let path = folder.join(name);
        match std::fs::remove_file(&path) {
            Err(source) if source.kind() != io::ErrorKind::NotFound => {
                Err(KeeperError::File { path, source })
            }
            _ => Ok(()),
        }
    }

    /// One that keeps nothing on a disk.
    pub(super) fn with_key(folder: Option<PathBuf>, key: KeyPair) -> Keeper {
        Keeper {
            inner: Arc::new(Inner {
                folder,
                key,
                current: watch::channel(None).0,
                issuing: Mutex::default(),
                next: Mutex::default(),
                addresses: Mutex::default(),
            }),
        }
    }

    /// This node's public key.
    ///
    /// # Errors
    /// When its key is of another kind.
    pub fn public_key(&self) -> Result<PublicKey, KeeperError> {
        Ok(PublicKey::of(&self.inner.key)?)
    }

    fn sealing(&self) -> SealingKey {
        SealingKey::derived(&self.inner.key.serialize_der(), b"issuing key at rest")
    }

    /// Takes papers up: kept first, then used.
    ///
    /// # Errors
    /// See [`KeeperError`].
    pub fn install(&self, papers: Papers) -> Result<(), KeeperError> {
        // Tried before they replace what works.
        self.current_of(&papers)?;
        if let Some(folder) = &self.inner.folder {
            let text = serde_json::to_vec_pretty(&papers).unwrap_or_default();
            write(&folder.join("papers.json"), &text)?;
        }
        self.publish(papers)
    }

    fn current_of(&self, papers: &Papers) -> Result<Current, KeeperError> {
        let key_pem = self.inner.key.serialize_pem();
        let credentials = Credentials::from_pem(&papers.chain_pem, &key_pem)?;
        let identity = credentials.identity().map_err(tls::TlsError::from)?;
        let roots = tls::root_store(papers.roots.iter().map(String::as_str))?;
        let foreign = papers
            .foreign
            .iter()
            .map(|(name, pem)| {
                let store = tls::root_store([pem.as_str()])?;
                Ok((name.clone(), Arc::new(store)))
            })
            .collect::<Result<_, tls::TlsError>>()?;
        let anchors = Anchors {
            cluster: papers.cluster.clone(),
            roots: Arc::new(roots),
            foreign,
        };
        let server = tls::server(anchors.clone(), &credentials)?;
        Ok(Current {
            papers: papers.clone(),
            identity,
            credentials,
            anchors,
            server,
        })
    }

    fn publish(&self, papers: Papers) -> Result<(), KeeperError> {
        let current = self.current_of(&papers)?;
        self.inner.current.send_replace(Some(Arc::new(current)));
        Ok(())
    }

    /// Its papers; `None` before it belongs to a cluster.
    pub fn papers(&self) -> Option<Papers> {
        let current = self.inner.current.borrow();
        current.as_ref().map(|current| current.papers.clone())
    }

    /// Whom its certificate names.
    pub fn identity(&self) -> Option<Identity> {
        let current = self.inner.current.borrow();
        current.as_ref().map(|current| current.identity.clone())
    }

    /// Takes up a new certificate.
    ///
    /// # Errors
    /// See [`KeeperError`].
    pub fn renewed(&self, certified: Certified) -> Result<(), KeeperError> {
        let papers = self.papers().ok_or(KeeperError::NoPapers)?;
        self.install(Papers {
            chain_pem: certified.chain_pem,
            ends_at_ms: certified.ends_at_ms,
            generation: certified.generation,
            ..papers
        })
    }

    /// Believes what the log says now: whose roots, and which node answers where.
    ///
    /// # Errors
    /// See [`KeeperError`].
    pub fn believe(&self, state: &ClusterState) -> Result<(), KeeperError> {
        let addresses = state
            .nodes
            .values()
            .map(|node| (node.address.clone(), node.id))
            .collect();
        *lock(&self.inner.addresses) = Arc::new(addresses);
        let Some(papers) = self.papers() else {
            return Ok(());
        };
        let Trust {
            authority: Some(authority),
            clusters,
            ..
        } = &state.trust
        else {
            return Ok(());
        };
        let roots: Vec<String> = authority
            .roots
            .iter()
            .map(|root| root.certificate_pem.clone())
            .collect();
        let foreign: BTreeMap<Name, String> = clusters
            .iter()
            .map(|(name, cluster)| (name.clone(), cluster.root_pem.clone()))
            .collect();
        if papers.roots == roots && papers.foreign == foreign {
            return Ok(());
        }
        self.install(Papers {
            roots,
            foreign,
            ..papers
        })
    }

    /// Keeps the issuing CA's key, sealed.
    ///
    /// # Errors
    /// See [`KeeperError`].
    pub fn keep_issuing(&self, key: IssuingKey) -> Result<(), KeeperError> {
        self.seal_issuing(ISSUING, &key)?;
        *lock(&self.inner.issuing) = Some(Arc::new(key));
        Ok(())
    }

    /// Keeps a key that was made here, before the log is asked to let it sign.
    ///
    /// # Errors
    /// See [`KeeperError`].
    pub fn keep_next(&self, key: IssuingKey) -> Result<(), KeeperError> {
        self.seal_issuing(NEXT, &key)?;
        *lock(&self.inner.next) = Some(Arc::new(key));
        Ok(())
    }

    /// The key that was made here and does not sign yet.
    pub fn next(&self) -> Option<Arc<IssuingKey>> {
        lock(&self.inner.next).clone()
    }

    /// Lets the key that was made here sign, if it is the one that the log names; whether it does.
    ///
    /// # Errors
    /// See [`KeeperError`].
    pub fn promote_next(&self, issuing: &Issuing) -> Result<bool, KeeperError> {
        let Some(next) = self.next().filter(|next| next.issuing == *issuing) else {
            return Ok(false);
        };
        self.seal_issuing(ISSUING, &next)?;
        self.remove(NEXT)?;
        *lock(&self.inner.issuing) = Some(next);
        *lock(&self.inner.next) = None;
        Ok(true)
    }

    /// Forgets the issuing CA's key: this node does not vote any more.
    ///
    /// # Errors
    /// See [`KeeperError`].
    pub fn forget_issuing(&self) -> Result<(), KeeperError> {
        *lock(&self.inner.issuing) = None;
        *lock(&self.inner.next) = None;
        self.remove(ISSUING)?;
        self.remove(NEXT)
    }

    /// The issuing CA's key, if this node has it.
    pub fn issuing(&self) -> Option<Arc<IssuingKey>> {
        lock(&self.inner.issuing).clone()
    }

    /// How connections are accepted; `None` before the node belongs to a cluster.
    pub fn server_config(&self) -> Option<Arc<ServerConfig>> {
        let current = self.inner.current.borrow();
        current.as_ref().map(|current| current.server.clone())
    }

    /// Whom a client's chain names, once TLS has taken it.
    pub(super) fn anchors(&self) -> Option<Anchors> {
        let current = self.inner.current.borrow();
        current.as_ref().map(|current| current.anchors.clone())
    }

    /// How to connect to the node at `address`: where the log knows it, to that very node.
    ///
    /// # Errors
    /// When this node has no papers.
    pub fn client_config(&self, address: &str) -> Result<Arc<ClientConfig>, KeeperError> {
        let current = self
            .inner
            .current
            .borrow()
            .clone()
            .ok_or(KeeperError::NoPapers)?;
        let meant = lock(&self.inner.addresses).get(address).copied();
        let expect = Expect::Node(
            current.anchors.clone(),
            Arc::new(move |found| meant.is_none_or(|meant| meant == found.node)),
        );
        // An expired certificate would end the handshake; without one a new one can still be asked for.
        let good = current.papers.ends_at_ms > proto::clock::realtime_ns() / 1_000_000;
        Ok(tls::client(expect, good.then_some(&current.credentials))?)
    }

    /// Waits until the node has papers.
    pub async fn until_papers(&self) {
        let mut current = self.inner.current.subscribe();
        // The sender lives in `self`.
        let _ = current.wait_for(Option::is_some).await;
    }
}

fn make_private(folder: &Path) -> Result<(), KeeperError> {
    use std::os::unix::fs::DirBuilderExt;
    let made = std::fs::DirBuilder::new()
        .mode(0o700)
        .recursive(true)
        .create(folder);
    made.map_err(|source| KeeperError::File {
        path: folder.to_owned(),
        source,
    })
}

fn read(path: &Path) -> Result<Option<String>, KeeperError> {
    match std::fs::read_to_string(path) {
        Ok(text) => Ok(Some(text)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(source) => Err(KeeperError::File {
            path: path.to_owned(),
            source,
        }),
    }
}

fn read_json<T: serde::de::DeserializeOwned>(path: &Path) -> Result<Option<T>, KeeperError> {
    read(path)?
        .map(|text| {
            serde_json::from_str(&text).map_err(|error| KeeperError::Damaged {
                path: path.to_owned(),
                // Where, not what: the file may hold a sealed key.
                why: format!("line {}, column {}", error.line(), error.column()),
            })
        })
        .transpose()
}

/// Written whole or not at all, for its owner only.
fn write(path: &Path, content: &[u8]) -> Result<(), KeeperError> {
    let written = || -> io::Result<()> {
        let new = path.with_extension("new");
        let mut file = std::fs::File::options()
            .create(true)
            .truncate(true)
            .write(true)
            .mode(0o600)
            .open(&new)?;
        file.write_all(content)?;
        file.sync_all()?;
        std::fs::rename(&new, path)?;
        std::fs::File::open(path.parent().unwrap_or(Path::new(".")))?.sync_all()
    };
    written().map_err(|source| KeeperError::File {
        path: path.to_owned(),
        source,
    })
}
