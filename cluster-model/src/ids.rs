//! The names and numbers that identify things in a cluster, each a type of its own.

use std::fmt;

use serde::{Deserialize, Serialize};

macro_rules! number {
    ($(#[$doc:meta])* $name:ident, $prefix:literal) => {
        $(#[$doc])*
        #[derive(
            Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
        )]
        #[serde(transparent)]
        pub struct $name(pub u64);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!($prefix, "{}"), self.0)
            }
        }
    };
}

number!(
    /// A node's number: the log index of the entry that added it, never used again.
    NodeId, "node-"
);
number!(
    /// A machine's number: the log index of the entry that created it, never used again.
    VmId, "vm-"
);
number!(
    /// A migration's number: the log index of the entry that started it.
    MigrationId, "m-"
);
number!(
    /// A volume's number: the log index of the entry that added it.
    VolumeId, "vol-"
);
number!(
    /// A position in the replicated log.
    LogIndex, "#"
);
number!(
    /// Which life of a host a node speaks from: drawn anew at every boot of the host
    /// (a restart of `clusterd` alone keeps it).
    Incarnation, "i"
);

/// The fencing token: the value of one cluster-wide counter at a change of owner.
///
/// Tokens only grow; whoever presents an older one is refused. Token 0 was never
/// granted to anybody and means "no token yet".
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
)]
#[serde(transparent)]
pub struct Token(pub u32);

impl Token {
    /// The value that stands for "never granted".
    pub const NONE: Token = Token(0);
    /// One above the largest token: the wire carries 30 bits of it.
    pub const LIMIT: u32 = 1 << 30;
    /// Added to a token to make the group id that the storage server sees, so that no
    /// token collides with an ordinary group.
    pub const GID_BASE: u32 = 0x4000_0000;

    /// The AUTH_SYS group id that carries this token on the wire.
    pub const fn gid(self) -> u32 {
        Self::GID_BASE + self.0
    }

    /// The token that a file's group says, if the group is a token at all.
    pub const fn from_gid(gid: u32) -> Option<Token> {
        match gid.checked_sub(Self::GID_BASE) {
            Some(token) if token < Self::LIMIT => Some(Token(token)),
            _ => None,
        }
    }

    /// The next token, or `None` when the counter is used up.
    pub const fn next(self) -> Option<Token> {
        if self.0 + 1 < Self::LIMIT {
            Some(Token(self.0 + 1))
        } else {
            None
        }
    }
}

impl fmt::Display for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "t{}", self.0)
    }
}

/// The longest name of a node, machine, volume or rule, in bytes.
pub const NAME_BYTES_MAX: usize = 63;

/// A name that a person gave to a node, machine, volume or rule: 1 to 63 characters of
/// `a-z`, `0-9` and `-`, beginning and ending with a letter or digit (an RFC 1123 label).
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Name(String);

/// Why a text is not a [`Name`].
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "`{text}` is not a name: use 1 to 63 characters of a-z, 0-9 and '-', beginning and ending with a letter or digit"
)]
pub struct NameError {
    /// The text as given, cut to a printable length.
    pub text: String,
}

impl Name {
    /// Checks a text and makes it a name.
    pub fn new(text: impl Into<String>) -> Result<Name, NameError> {
        let text = text.into();
        let plain = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit();
        let bytes = text.as_bytes();
        let good = !bytes.is_empty()
            && bytes.len() <= NAME_BYTES_MAX
            && bytes.iter().all(|&b| plain(b) || b == b'-')
            && plain(bytes[0])
            && plain(bytes[bytes.len() - 1]);
        if good {
            Ok(Name(text))
        } else {
            Err(NameError {
                text: text.chars().take(80).collect(),
            })
        }
    }

    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl TryFrom<String> for Name {
    type Error = NameError;
    fn try_from(text: String) -> Result<Name, NameError> {
        Name::new(text)
    }
}

impl std::str::FromStr for Name {
    type Err = NameError;
    fn from_str(text: &str) -> Result<Name, NameError> {
        Name::new(text)
    }
}

impl From<Name> for String {
    fn from(name: Name) -> String {
        name.0
    }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// A request's own id, chosen by whoever asks: a command with an id that was applied
/// already answers what it answered then.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct RequestId(pub String);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_survives_the_way_over_the_group_id() {
        for token in [Token(0), Token(1), Token(Token::LIMIT - 1)] {
            assert_eq!(Token::from_gid(token.gid()), Some(token));
        }
        assert_eq!(Token::from_gid(0), None);
        assert_eq!(Token::from_gid(u32::MAX), None);
        assert_eq!(Token::from_gid(65_534), None);
    }

    #[test]
    fn the_last_token_has_no_successor() {
        assert_eq!(
            Token(Token::LIMIT - 2).next(),
            Some(Token(Token::LIMIT - 1))
        );
        assert_eq!(Token(Token::LIMIT - 1).next(), None);
    }

    #[test]
    fn names_are_dns_labels() {
        for good in ["a", "db-1", "0x", &"a".repeat(63)] {
            assert!(Name::new(good).is_ok(), "{good}");
        }
        for bad in ["", "-a", "a-", "A", "a_b", "a b", "ä", &"a".repeat(64)] {
            assert!(Name::new(bad).is_err(), "{bad}");
        }
    }
}
