//! The access token: where it is read from, and how it is shown with every call.

use std::fmt;
use std::io::Read;
use std::path::Path;

use proto::token::AccessToken;
use tonic::metadata::{Ascii, MetadataValue};
use tonic::service::Interceptor;
use tonic::{Request, Status};

use super::CliError;

/// The longest token read, bytes.
pub const TOKEN_BYTES_MAX: usize = 4_096;

/// Reads an access token.
///
/// # Errors
/// When the text is none; it is not repeated.
pub fn token(text: &str) -> Result<AccessToken, CliError> {
    AccessToken::parse(text).map_err(|error| CliError::BadToken(error.to_string()))
}

/// Reads an access token from a file.
///
/// # Errors
/// When the file cannot be read or holds none.
pub fn token_file(path: &Path) -> Result<AccessToken, CliError> {
    let unreadable = |cause: String| CliError::BadToken(format!("{}: {cause}", path.display()));
    let file = std::fs::File::open(path).map_err(|error| unreadable(error.to_string()))?;
    let mut text = String::new();
    file.take(TOKEN_BYTES_MAX as u64 + 1)
        .read_to_string(&mut text)
        .map_err(|error| unreadable(error.to_string()))?;
    AccessToken::parse(&text).map_err(|error| unreadable(error.to_string()))
}

/// Adds the token to every call, as `authorization: Bearer …`.
#[derive(Clone)]
pub struct Bearer(Option<MetadataValue<Ascii>>);

impl fmt::Debug for Bearer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if self.0.is_some() {
            "Bearer(secret)"
        } else {
            "Bearer(none)"
        })
    }
}

impl Bearer {
    /// Shows this token, or nothing.
    ///
    /// # Errors
    /// When the token holds what no header can.
    pub fn of(token: Option<&AccessToken>) -> Result<Bearer, CliError> {
        let Some(token) = token else {
            return Ok(Bearer(None));
        };
        let mut value = MetadataValue::try_from(token.bearer())
            .map_err(|_| CliError::BadToken("it holds characters that none of ours has".into()))?;
        // Kept out of debug output and out of HPACK's table (RFC 7541 section 7.1.3).
        value.set_sensitive(true);
        Ok(Bearer(Some(value)))
    }
}

impl Interceptor for Bearer {
    fn call(&mut self, mut request: Request<()>) -> Result<Request<()>, Status> {
        if let Some(value) = &self.0 {
            request
                .metadata_mut()
                .insert("authorization", value.clone());
        }
        Ok(request)
    }
}
