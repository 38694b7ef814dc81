//! A volume on an NFS server: its connection, its identity, its files.

use std::collections::{HashMap, HashSet};
use std::sync::Mutex;
use std::time::Duration;

use bytes::Bytes;
use cluster_model::ids::Token;

use super::{DiskStat, Probe, VolumeError, VolumeRef};
use crate::certify::{Certificate, FLOOD_ROUNDS, certify};
use crate::dialer::Dialer;
use crate::fence::{Claimed, write_all};
use crate::nfs::client::SetAttributes;
use crate::nfs::{Attributes, Credential, FileHandle, NfsClient, NfsError, Stable, Status, mount};
use crate::volume::{DiskPath, IDENTITY_BYTES_MAX, IDENTITY_FILE, Identity, NfsUrl};

/// How long a metadata call may take.
pub(super) const CALL_TIMEOUT: Duration = Duration::from_secs(10);

/// File handles remembered at most; they only save a LOOKUP.
const HANDLES_MAX: usize = 10_000;

/// MODIFY and EXTEND: what creating a file in a directory needs.
const MAY_CREATE: u32 = nfs3_types::nfs3::ACCESS3_MODIFY | nfs3_types::nfs3::ACCESS3_EXTEND;

#[derive(Debug)]
pub(super) struct NfsVolume {
    url: NfsUrl,
    pub(super) name: String,
    pub(super) reference: VolumeRef,
    dialer: Dialer,
    connected: tokio::sync::Mutex<Option<Connected>>,
    /// Disks being created by requests that have not ended.
    pub(super) busy: Mutex<HashSet<DiskPath>>,
}

#[derive(Clone, Debug)]
struct Connected {
    client: NfsClient,
    handles: std::sync::Arc<Mutex<HashMap<DiskPath, FileHandle>>>,
    /// Set once the identity was found to be ours.
    ours: std::sync::Arc<std::sync::OnceLock<Identity>>,
}

type Result<T> = std::result::Result<T, VolumeError>;

impl NfsVolume {
    pub(super) fn new(url: NfsUrl, reference: VolumeRef, dialer: Dialer) -> NfsVolume {
        NfsVolume {
            name: url.to_string(),
            url,
            reference,
            dialer,
            connected: tokio::sync::Mutex::new(None),
            busy: Mutex::new(HashSet::new()),
        }
    }

    /// Who does metadata work here.
    pub(super) fn broker(&self) -> Credential {
        Credential {
            uid: self.reference.broker_uid,
            gid: self.reference.broker_uid,
        }
    }

    pub(super) fn failed(&self, what: &str, source: NfsError) -> VolumeError {
        VolumeError::from_nfs(&self.name, self.reference.broker_uid, what, source)
    }

    /// The connection, made anew if it is gone. A request waits for another's attempt.
    async fn connect(&self) -> Result<Connected> {
        let mut connected = self.connected.lock().await;
        if let Some(connected) = connected.as_ref()
            && !connected.client.connection().is_closed()
        {
            return Ok(connected.clone());
        }
        let client = mount(&self.url, &self.dialer, CALL_TIMEOUT).await?;
        let new = Connected {
            client,
            handles: std::sync::Arc::default(),
            ours: std::sync::Arc::default(),
        };
        *connected = Some(new.clone());
        Ok(new)
    }

    /// The connection to a volume that is known to be ours.
    async fn ours(&self) -> Result<Connected> {
        let connected = self.connect().await?;
        if connected.ours.get().is_none() {
            let identity = match self.read_identity(&connected.client).await? {
                Some(IdentityFile {
                    identity: Some(identity),
                    ..
                }) => identity,
                _ => {
                    return Err(VolumeError::NotAdopted {
                        volume: self.name.clone(),
                    });
                }
            };
            self.check_owner(&identity)?;
            let _ = connected.ours.set(identity);
        }
        Ok(connected)
    }

    pub(super) async fn client(&self) -> Result<NfsClient> {
        Ok(self.ours().await?.client)
    }

    fn check_owner(&self, identity: &Identity) -> Result<()> {
        if identity.cluster_id == self.reference.cluster_id {
            return Ok(());
        }
        let owner = identity
            .cluster_id
            .chars()
            .filter(|c| !c.is_control())
            .take(100)
            .collect();
        Err(VolumeError::OtherCluster {
            volume: self.name.clone(),
            owner,
        })
    }

    async fn read_identity(&self, client: &NfsClient) -> Result<Option<IdentityFile>> {
        let broker = self.broker();
        let file = match client.lookup(broker, client.root(), IDENTITY_FILE).await {
            Ok(file) => file,
            Err(error) if error.status() == Some(Status::NFS3ERR_NOENT) => return Ok(None),
            Err(error) => return Err(self.failed("looking for its identity", error)),
        };
        let attributes = client
            .getattr(broker, &file)
            .await
            .map_err(|error| self.failed("looking at its identity", error))?;
        let content = client
            .read(broker, &file, 0, IDENTITY_BYTES_MAX as u32)
            .await
            .map_err(|error| self.failed("reading its identity", error))?;
        let bad = |problem: String| VolumeError::BadIdentity {
            volume: self.name.clone(),
            problem,
        };
        if !content.eof && content.data.len() >= IDENTITY_BYTES_MAX {
            return Err(bad("it is too long".into()));
        }
        let identity =
            Identity::from_json(&content.data).map_err(|error| bad(error.to_string()))?;
        Ok(Some(IdentityFile {
            file,
            uid: attributes.uid,
            identity,
        }))
    }

    pub(super) async fn probe(&self) -> Result<Probe> {
        let client = self.connect().await?.client;
        let identity = self
            .read_identity(&client)
            .await?
            .and_then(|file| file.identity);
        let broker = self.broker();
        let room = client
            .fsstat(broker)
            .await
            .map_err(|error| self.failed("asking for free space (FSSTAT)", error))?;
        let access = client
            .access(broker, client.root(), MAY_CREATE)
            .await
            .map_err(|error| self.failed("asking for access", error))?;
        Ok(Probe {
            identity,
            size_bytes: room.size_bytes,
            free_bytes: room.free_bytes,
            writable: access & MAY_CREATE == MAY_CREATE,
        })
    }

    /// Writes the identity file of a volume that has none. Of two clusters that try at once, the
    /// server lets one create the file.
    pub(super) async fn adopt(&self, volume_uuid: &str) -> Result<String> {
        let client = self.connect().await?.client;
        let broker = self.broker();
        let file = match self.read_identity(&client).await? {
            Some(IdentityFile {
                identity: Some(identity),
                ..
            }) => {
                self.check_owner(&identity)?;
                return Ok(identity.volume_uuid);
            }
            // Its writer died before the content was written. The broker's uid is drawn per
            // cluster, so the file's owner says whose attempt it was.
            Some(unfinished) if unfinished.uid == self.reference.broker_uid => unfinished.file,
            Some(_) => {
                return Err(VolumeError::BadIdentity {
                    volume: self.name.clone(),
                    problem: "it is empty and belongs to another user: if no cluster is being \
                              set up on this volume, delete it"
                        .into(),
                });
            }
            None => {
                let attributes = SetAttributes {
                    mode: Some(0o644),
                    ..SetAttributes::default()
                };
                client
                    .create(broker, client.root(), IDENTITY_FILE, attributes)
                    .await
                    .map_err(|error| self.failed("create its identity file", error))?
            }
        };
        let identity = Identity {
            cluster_id: self.reference.cluster_id.clone(),
            volume_uuid: volume_uuid.to_owned(),
        };
        write_all(
            &client,
            broker,
            &file,
            0,
            Bytes::from(identity.to_json()),
            Stable::FILE_SYNC,
        )
        .await
        .map_err(|error| self.failed("write its identity file", error))?;
        match self.read_identity(&client).await? {
            Some(IdentityFile {
                identity: Some(read),
                ..
            }) => {
                self.check_owner(&read)?;
                Ok(read.volume_uuid)
            }
            _ => Err(VolumeError::BadIdentity {
                volume: self.name.clone(),
                problem: "it cannot be read back".into(),
            }),
        }
    }

    pub(super) async fn certify(&self) -> Result<Certificate> {
        let client = self.client().await?;
        // A connection of its own, as another node's would be.
        let other = mount(&self.url, &self.dialer, CALL_TIMEOUT).await?;
        certify(&client, &other, self.reference.broker_uid, FLOOD_ROUNDS)
            .await
            .map_err(|error| self.failed("create a file to try the fence with", error))
    }

    /// Finds a file; asks the server only the first time on each connection.
    async fn find(&self, connected: &Connected, path: &DiskPath) -> Result<Option<FileHandle>> {
        let known = lock(&connected.handles).get(path).cloned();
        if known.is_some() {
            return Ok(known);
        }
        match crate::disk::find(&connected.client, self.broker(), path).await {
            Ok(file) => {
                let mut handles = lock(&connected.handles);
                if handles.len() >= HANDLES_MAX {
                    handles.clear();
                }
                handles.insert(path.clone(), file.clone());
                Ok(Some(file))
            }
            Err(error)
                if matches!(
                    error.status(),
                    Some(Status::NFS3ERR_NOENT | Status::NFS3ERR_NOTDIR)
                ) =>
            {
                Ok(None)
            }
            Err(error) => Err(self.failed(&format!("look for `{path}`"), error)),
        }
    }

    /// A file and its attributes as the server says now. A handle that has gone stale and a
    /// connection that has died unseen are got over here, where asking twice does no harm.
    async fn look(&self, path: &DiskPath) -> Result<Option<(Connected, FileHandle, Attributes)>> {
        let mut tries = 0;
        loop {
            tries += 1;
            let connected = self.ours().await?;
            let found = self.find(&connected, path).await;
            let error = match found {
                Ok(None) => return Ok(None),
                Ok(Some(file)) => match connected.client.getattr(self.broker(), &file).await {
                    Ok(attributes) => return Ok(Some((connected, file, attributes))),
                    Err(error) => self.failed(&format!("look at `{path}`"), error),
                },
                Err(error) => error,
            };
            lock(&connected.handles).remove(path);
            if tries == 2 {
                return Err(error);
            }
        }
    }

    pub(super) fn forget(&self, path: &DiskPath) {
        if let Ok(connected) = self.connected.try_lock()
            && let Some(connected) = connected.as_ref()
        {
            lock(&connected.handles).remove(path);
        }
    }

    pub(super) async fn stat(&self, path: &DiskPath) -> Result<Option<DiskStat>> {
        Ok(self.look(path).await?.map(|(_, _, attributes)| DiskStat {
            size_bytes: attributes.size_bytes,
            uid: attributes.uid,
            gid: attributes.gid,
            mode: attributes.mode,
        }))
    }

    /// Finds a file for a claim or a verification, and refuses a claim that is out of date.
    pub(super) async fn prepare(&self, path: &DiskPath, claim: Option<Token>) -> Result<Claimed> {
        let Some((connected, file, attributes)) = self.look(path).await? else {
            return Err(VolumeError::NotFound {
                volume: self.name.clone(),
                path: path.clone(),
            });
        };
        if let (Some(offered), Some(present)) = (claim, Token::from_gid(attributes.gid))
            && present > offered
        {
            return Err(VolumeError::NewerToken {
                path: path.clone(),
                present,
                offered,
            });
        }
        Ok(Claimed {
            path: path.to_string(),
            client: connected.client,
            file,
            broker_uid: self.reference.broker_uid,
        })
    }

    /// Deletes a disk that is under `token` or an older one, but not older than `since`.
    pub(super) async fn delete_disk(
        &self,
        path: &DiskPath,
        token: Token,
        since: Token,
    ) -> Result<()> {
        let Some((connected, _, attributes)) = self.look(path).await? else {
            return Ok(());
        };
        if attributes.uid != self.reference.broker_uid {
            return Err(VolumeError::Exists {
                volume: self.name.clone(),
                path: path.clone(),
                why: "it does not belong to this cluster's broker",
            });
        }
        if let Some(present) = Token::from_gid(attributes.gid)
            && present > token
        {
            return Err(VolumeError::NewerToken {
                path: path.clone(),
                present,
                offered: token,
            });
        }
        if Token::from_gid(attributes.gid).is_none_or(|present| present < since) {
            return Ok(());
        }
        let (directories, name) = path.parts();
        let client = connected.client;
        let what = format!("delete `{path}`");
        let mut place = client.root().clone();
        for directory in directories {
            place = client
                .lookup(self.broker(), &place, directory)
                .await
                .map_err(|error| self.failed(&what, error))?;
        }
        self.forget(path);
        match client.remove(self.broker(), &place, name).await {
            Ok(()) => Ok(()),
            Err(error) if error.status() == Some(Status::NFS3ERR_NOENT) => Ok(()),
            Err(error) => Err(self.failed(&what, error)),
        }
    }
}

struct IdentityFile {
    file: FileHandle,
    uid: u32,
    identity: Option<Identity>,
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex
        .lock()
        .unwrap_or_else(|poisoned| poisoned.into_inner())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::nfs::scripted_server::ScriptedServer;
    use crate::store::Store;
    use crate::volume::VolumeUrl;

    fn reference(server: &ScriptedServer) -> VolumeRef {
        let url = VolumeUrl::Nfs(server.url());
        VolumeRef::parse(&url.to_string(), "", "cluster-one", 50_000).unwrap()
    }

    #[tokio::test]
    async fn an_export_that_cannot_be_written_says_why_and_what_to_try() {
        for (status, advice) in [
            (Status::NFS3ERR_ROFS, "export or mount it read-write"),
            (Status::NFS3ERR_NOSPC, "free space"),
            (Status::NFS3ERR_DQUOT, "raise the quota"),
            (Status::NFS3ERR_ACCES, "chown 50000"),
            (Status::NFS3ERR_IO, "NFS3ERR_IO"),
        ] {
            let server = ScriptedServer::start(4096, 1).await;
            server.world().create_status = status;
            let store = Store::new(Dialer::default(), false);
            let error = store
                .adopt(&reference(&server), "u")
                .await
                .unwrap_err()
                .to_string();
            assert!(error.contains(advice), "{status}: {error}");
            assert!(error.contains(&server.url().to_string()), "{error}");
        }
    }

    #[tokio::test]
    async fn a_probe_changes_nothing_and_tells_a_read_only_export() {
        let server = ScriptedServer::start(4096, 1).await;
        let store = Store::new(Dialer::default(), false);
        let probe = store.probe(&reference(&server)).await.unwrap();
        let room = (probe.size_bytes, probe.free_bytes);
        assert_eq!(
            (probe.identity, room, probe.writable),
            (None, (1000, 300), true)
        );
        server.world().access = nfs3_types::nfs3::ACCESS3_LOOKUP;
        assert!(!store.probe(&reference(&server)).await.unwrap().writable);
        assert!(server.world().seen.is_empty());
        assert_eq!(server.world().setattrs, 0);
    }
}
