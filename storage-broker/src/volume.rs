//! What a volume's address means, whose volume it is, and which paths on it may name a disk.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// The standard NFS port, used where an address names none.
pub const NFS_PORT: u16 = 2049;

/// The longest address of a volume, in bytes.
pub const URL_BYTES_MAX: usize = 1024;

/// The name of the identity file in the root of every volume.
pub const IDENTITY_FILE: &str = ".baton-volume.json";

/// Names that begin so are ours, not disks.
const RESERVED_PREFIX: &str = ".baton-";

/// A volume's address, understood.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum VolumeUrl {
    /// An NFSv3 export.
    Nfs(NfsUrl),
    /// A directory of this host: a local disk, or a mount that several nodes have.
    Dir(PathBuf),
}

/// Whether connections to an NFS server are under TLS (RFC 9289), as its address says.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum NfsTls {
    /// Always, or there is no connection.
    Require,
    /// Never, even if the server offers it.
    Off,
}

impl NfsTls {
    fn as_str(self) -> &'static str {
        match self {
            NfsTls::Require => "require",
            NfsTls::Off => "off",
        }
    }
}

/// The longest file handle, in bytes (RFC 1813, NFS3_FHSIZE).
const HANDLE_BYTES_MAX: usize = 64;

/// `nfs://host[:port]/export[?mountport=N][&tls=require|off][&root=HEX]`, understood.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct NfsUrl {
    /// Name or address of the server, without brackets.
    pub host: String,
    /// The NFS port as written; `None` means [`NFS_PORT`].
    pub port: Option<u16>,
    /// The MOUNT port as written. `None` means the NFS port where that is written too (a server
    /// that serves both on one port), and otherwise what the portmapper says.
    pub mount_port: Option<u16>,
    /// The exported path, beginning with `/`.
    pub export: String,
    /// What it says of TLS, if anything.
    pub tls: Option<NfsTls>,
    /// The file handle of the export's root, where it is known: then neither MOUNT nor the portmapper is
    /// asked. For servers whose MOUNT has no TLS.
    pub root: Option<Box<[u8]>>,
}

impl NfsUrl {
    /// The NFS port to connect to.
    pub fn nfs_port(&self) -> u16 {
        self.port.unwrap_or(NFS_PORT)
    }

    /// The MOUNT port to connect to; `None`: ask the portmapper.
    pub fn mount_port(&self) -> Option<u16> {
        self.mount_port.or(self.port)
    }
}

/// Why a text is not a volume's address.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "`{text}` is not a volume: {problem}; write nfs://HOST[:PORT]/EXPORT[?mountport=PORT][&tls=require] or dir:/PATH"
)]
pub struct VolumeUrlError {
    /// The text as given, cut to a printable length.
    pub text: String,
    /// What is wrong with it.
    pub problem: String,
}

impl FromStr for VolumeUrl {
    type Err = VolumeUrlError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        parse(text).map_err(|problem| VolumeUrlError {
            text: text.chars().take(100).collect(),
            problem,
        })
    }
}

fn parse(text: &str) -> Result<VolumeUrl, String> {
    if text.len() > URL_BYTES_MAX {
        return Err(format!("it is longer than {URL_BYTES_MAX} bytes"));
    }
    if text.chars().any(char::is_control) {
        return Err("it contains a control character".into());
    }
    if let Some(path) = text.strip_prefix("dir:") {
        let path = PathBuf::from(path);
        if !path.is_absolute() {
            return Err("the directory's path must begin with `/`".into());
        }
        if path
            .components()
            .any(|part| part == std::path::Component::ParentDir)
        {
            return Err("the directory's path must not contain `..`".into());
        }
        return Ok(VolumeUrl::Dir(path));
    }
    let Some(rest) = text.strip_prefix("nfs://") else {
        return Err("it begins with neither `nfs://` nor `dir:`".into());
    };
    let (rest, query) = match rest.split_once('?') {
        Some((rest, query)) => (rest, Some(query)),
        None => (rest, None),
    };
    let Some(slash) = rest.find('/') else {
        return Err("it names no export after the host".into());
    };
    let (authority, export) = rest.split_at(slash);
    if export.split('/').any(|part| part == "..") {
        return Err("the export must not contain `..`".into());
    }
    let (host, port) = parse_authority(authority)?;
    let (mut mount_port, mut tls, mut root) = (None, None, None);
    for pair in query.into_iter().flat_map(|query| query.split('&')) {
        match pair.split_once('=') {
            Some(("mountport", value)) => mount_port = Some(parse_port(value)?),
            // Said twice, the two could contradict each other.
            Some(("tls", _)) if tls.is_some() => return Err("it says `tls` twice".into()),
            Some(("tls", "require")) => tls = Some(NfsTls::Require),
            Some(("tls", "off")) => tls = Some(NfsTls::Off),
            Some(("tls", value)) => {
                return Err(format!("`{value}` is neither `require` nor `off`"));
            }
            Some(("root", value)) => root = Some(parse_handle(value)?),
            _ => return Err(format!("`{pair}` is not an option of an NFS volume")),
        }
    }
    Ok(VolumeUrl::Nfs(NfsUrl {
        host,
        port,
        mount_port,
        export: export.to_owned(),
        tls,
        root,
    }))
}

fn parse_authority(authority: &str) -> Result<(String, Option<u16>), String> {
    let (host, port) = if let Some(rest) = authority.strip_prefix('[') {
        let (host, tail) = rest
            .split_once(']')
            .ok_or("the bracket of the IPv6 address is not closed")?;
        host.parse::<std::net::Ipv6Addr>()
            .map_err(|_| "it is no IPv6 address in the brackets")?;
        match tail {
            "" => (host, None),
            tail => (
                host,
                Some(
                    tail.strip_prefix(':')
                        .ok_or("`:` expected after the bracket")?,
                ),
            ),
        }
    } else {
        match authority.split_once(':') {
            Some((host, port)) => (host, Some(port)),
            None => (authority, None),
        }
    };
    if host.is_empty() {
        return Err("it names no host".into());
    }
    if !host
        .chars()
        .all(|c| c.is_ascii_alphanumeric() || "-._:".contains(c))
    {
        return Err(format!("`{host}` is not a host name"));
    }
    Ok((host.to_owned(), port.map(parse_port).transpose()?))
}

fn parse_handle(text: &str) -> Result<Box<[u8]>, String> {
    let digit = |byte: &u8| char::from(*byte).to_digit(16).map(|value| value as u8);
    let bytes: Option<Vec<u8>> = text
        .as_bytes()
        .chunks(2)
        .map(|pair| match pair {
            [high, low] => Some(digit(high)? << 4 | digit(low)?),
            _ => None,
        })
        .collect();
    match bytes {
        Some(bytes) if (1..=HANDLE_BYTES_MAX).contains(&bytes.len()) => Ok(bytes.into()),
        _ => Err(format!(
            "its `root` is no file handle: 1 to {HANDLE_BYTES_MAX} bytes in hexadecimal"
        )),
    }
}

fn parse_port(text: &str) -> Result<u16, String> {
    match text.parse::<u16>() {
        Ok(port) if port > 0 => Ok(port),
        _ => Err(format!("`{text}` is not a port (1 to 65535)")),
    }
}

impl fmt::Display for VolumeUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            VolumeUrl::Nfs(url) => url.fmt(f),
            VolumeUrl::Dir(path) => write!(f, "dir:{}", path.display()),
        }
    }
}

impl fmt::Display for NfsUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.host.contains(':') {
            write!(f, "nfs://[{}]", self.host)?;
        } else {
            write!(f, "nfs://{}", self.host)?;
        }
        if let Some(port) = self.port {
            write!(f, ":{port}")?;
        }
        f.write_str(&self.export)?;
        let mut separator = '?';
        if let Some(port) = self.mount_port {
            write!(f, "{separator}mountport={port}")?;
            separator = '&';
        }
        if let Some(tls) = self.tls {
            write!(f, "{separator}tls={}", tls.as_str())?;
            separator = '&';
        }
        if let Some(root) = &self.root {
            write!(f, "{separator}root=")?;
            for byte in root.iter() {
                write!(f, "{byte:02x}")?;
            }
        }
        Ok(())
    }
}

/// The path of a disk on its volume: relative, without `.` and `..`, not one of our own files.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct DiskPath(String);

/// The longest path of a disk, in bytes.
pub const DISK_PATH_BYTES_MAX: usize = 1024;

/// How many directories deep a disk may lie.
pub const DISK_PATH_PARTS_MAX: usize = 8;

/// Why a text does not name a disk.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "`{text}` cannot be the path of a disk: {problem}; use a relative path such as vms/web1.raw"
)]
pub struct DiskPathError {
    /// The text as given, cut to a printable length.
    pub text: String,
    /// What is wrong with it.
    pub problem: &'static str,
}

impl FromStr for DiskPath {
    type Err = DiskPathError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let problem = if text.is_empty() {
            "it is empty"
        } else if text.len() > DISK_PATH_BYTES_MAX {
            "it is too long"
        } else if text.chars().any(char::is_control) {
            "it contains a control character"
        } else if text.starts_with('/') {
            "it begins with `/`"
        } else if text.split('/').any(|part| part == "..") {
            "it leads out of the volume (`..`)"
        } else if text.split('/').any(|part| part.is_empty() || part == ".") {
            "it has an empty part or `.`"
        } else if text.split('/').any(|part| part.len() > 200) {
            "one part is longer than 200 bytes"
        } else if text.split('/').count() > DISK_PATH_PARTS_MAX {
            "it lies too many directories deep"
        } else if text
            .split('/')
            .any(|part| part.starts_with(RESERVED_PREFIX))
        {
            "names that begin with `.baton-` are reserved"
        } else {
            return Ok(DiskPath(text.to_owned()));
        };
        Err(DiskPathError {
            text: text.chars().take(100).collect(),
            problem,
        })
    }
}

impl DiskPath {
    /// The path as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The directories, outermost first, and the file's own name.
    pub fn parts(&self) -> (Vec<&str>, &str) {
        let mut parts: Vec<&str> = self.0.split('/').collect();
        let name = parts.pop().unwrap_or_default();
        (parts, name)
    }
}

impl fmt::Display for DiskPath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// What the identity file says: whose volume this is, so that no other cluster takes it by mistake.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Identity {
    /// The cluster that adopted the volume.
    pub cluster_id: String,
    /// The volume's own id, drawn when it was adopted.
    pub volume_uuid: String,
}

/// The largest identity file that is read.
pub const IDENTITY_BYTES_MAX: usize = 4096;

impl Identity {
    /// The content of the identity file.
    pub fn to_json(&self) -> Vec<u8> {
        let mut text = serde_json::to_vec_pretty(self).unwrap_or_default();
        text.push(b'\n');
        text
    }

    /// Reads the content of an identity file; `None` for an empty one, whose writer died.
    ///
    /// # Errors
    /// When the content is not an identity.
    pub fn from_json(content: &[u8]) -> Result<Option<Identity>, serde_json::Error> {
        if content.is_empty() {
            return Ok(None);
        }
        serde_json::from_slice(content).map(Some)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_is_understood_and_written_back_the_same() {
        for text in [
            "nfs://10.0.0.1/export",
            "nfs://nas.example:12049/srv/vm",
            "nfs://nas:2049/srv?mountport=20048",
            "nfs://nas:2049/srv?mountport=20048&tls=require",
            "nfs://nas/srv?tls=off",
            "nfs://nas/srv?tls=require&root=0100070a",
            "nfs://[::1]:2049/srv",
            "dir:/var/lib/vm",
        ] {
            assert_eq!(text.parse::<VolumeUrl>().unwrap().to_string(), text);
        }
    }

    #[test]
    fn ports_fall_back_to_one_port_for_both_or_the_portmapper() {
        let port = |text: &str| match text.parse::<VolumeUrl>().unwrap() {
            VolumeUrl::Nfs(url) => (url.nfs_port(), url.mount_port()),
            VolumeUrl::Dir(_) => panic!("not NFS"),
        };
        assert_eq!(port("nfs://h/e"), (2049, None));
        assert_eq!(port("nfs://h:7/e"), (7, Some(7)));
        assert_eq!(port("nfs://h:7/e?mountport=8"), (7, Some(8)));
    }

    #[test]
    fn a_malformed_address_is_refused_with_the_reason() {
        for (text, reason) in [
            ("", "neither"),
            ("http://x/y", "neither"),
            ("nfs://host", "no export"),
            ("nfs:///export", "no host"),
            ("nfs://h:0/e", "not a port"),
            ("nfs://h:99999/e", "not a port"),
            ("nfs://h/e?soft", "not an option"),
            ("nfs://h/e?tls=maybe", "neither `require` nor `off`"),
            ("nfs://h/e?tls=require&tls=off", "twice"),
            ("nfs://h/e?root=", "no file handle"),
            ("nfs://h/e?root=012", "no file handle"),
            ("nfs://h/e?root=zz", "no file handle"),
            ("nfs://h/e/../f", "`..`"),
            ("nfs://h st/e", "not a host name"),
            ("nfs://[::1/e", "not closed"),
            ("dir:relative", "begin with `/`"),
            ("dir:/a/../b", "`..`"),
            ("dir:/a\0b", "control"),
        ] {
            let error = text.parse::<VolumeUrl>().unwrap_err().to_string();
            assert!(error.contains(reason), "{text:?}: {error}");
            assert!(error.contains("nfs://HOST"), "says what to write: {error}");
        }
    }

    #[test]
    fn a_disk_path_cannot_leave_the_volume_or_name_our_own_files() {
        for text in [
            "",
            "/etc/passwd",
            "../x",
            "a/../../x",
            "a//b",
            "./a",
            "a/.",
            ".baton-volume.json",
            "vms/.baton-x",
            "a\nb",
            "1/2/3/4/5/6/7/8/9",
        ] {
            assert!(text.parse::<DiskPath>().is_err(), "{text:?}");
        }
        let path: DiskPath = "vms/web1.raw".parse().unwrap();
        assert_eq!(path.parts(), (vec!["vms"], "web1.raw"));
    }

    #[test]
    fn an_identity_survives_its_file_and_an_empty_file_is_told_apart() {
        let identity = Identity {
            cluster_id: "c1".into(),
            volume_uuid: "u1".into(),
        };
        assert_eq!(
            Identity::from_json(&identity.to_json()).unwrap(),
            Some(identity)
        );
        assert_eq!(Identity::from_json(b"").unwrap(), None);
        assert!(Identity::from_json(b"{\"x\":").is_err());
    }
}
