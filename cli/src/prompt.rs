//! Asking for a secret on the terminal, without showing it.

use std::io::{IsTerminal, Read, Write};

use nix::sys::termios::{self, LocalFlags, SetArg, Termios};

use crate::client::{CliError, TOKEN_BYTES_MAX};

/// Ctrl-C and Ctrl-D: the asked person wants none of it.
const LEAVE: [u8; 2] = [0x03, 0x04];
/// Backspace and delete: the last character was wrong.
const RUB_OUT: [u8; 2] = [0x08, 0x7f];

/// Asks; `instead` says how to give it where there is no terminal.
///
/// # Errors
/// When there is nobody to ask, or who is asked leaves.
pub fn secret(question: &str, instead: &str) -> Result<String, CliError> {
    let stdin = std::io::stdin();
    if !stdin.is_terminal() {
        return Err(CliError::Local(format!(
            "there is nobody to ask for it here; try: {instead}"
        )));
    }
    eprint!("{question}: ");
    std::io::stderr().flush()?;
    let quiet = Quiet::enter()?;
    let line = line(stdin.lock().bytes());
    drop(quiet);
    eprintln!();
    line
}

/// One line, with rubbed out characters gone.
fn line(typed: impl Iterator<Item = std::io::Result<u8>>) -> Result<String, CliError> {
    let mut bytes = Vec::new();
    for byte in typed {
        match byte? {
            b'\r' | b'\n' => break,
            byte if LEAVE.contains(&byte) => {
                return Err(CliError::Interrupted("nothing was done".into()));
            }
            byte if RUB_OUT.contains(&byte) => {
                bytes.pop();
            }
            _ if bytes.len() >= TOKEN_BYTES_MAX => {
                return Err(CliError::Local(format!(
                    "that is over {TOKEN_BYTES_MAX} characters"
                )));
            }
            byte => bytes.push(byte),
        }
    }
    let text = String::from_utf8(bytes)
        .map_err(|_| CliError::Local("that is not text; paste it again".into()))?;
    Ok(text.trim().to_owned())
}

/// The terminal without echo, line editing (its lines end at 4,096 bytes) and signals, until it is dropped.
struct Quiet {
    before: Termios,
}

impl Quiet {
    fn enter() -> Result<Quiet, CliError> {
        let stdin = std::io::stdin();
        let before = termios::tcgetattr(&stdin).map_err(CliError::local)?;
        let mut quiet = before.clone();
        quiet
            .local_flags
            .remove(LocalFlags::ECHO | LocalFlags::ECHONL | LocalFlags::ICANON | LocalFlags::ISIG);
        termios::tcsetattr(&stdin, SetArg::TCSAFLUSH, &quiet).map_err(CliError::local)?;
        Ok(Quiet { before })
    }
}

impl Drop for Quiet {
    fn drop(&mut self) {
        let _ = termios::tcsetattr(std::io::stdin(), SetArg::TCSAFLUSH, &self.before);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn typed(text: &str) -> Result<String, CliError> {
        line(text.bytes().map(Ok))
    }

    #[test]
    fn a_line_ends_at_return_and_forgets_what_was_rubbed_out() {
        assert_eq!(typed(" BT1.ax\x7fbc \rmore").expect("a line"), "BT1.abc");
        assert_eq!(typed("\x7f\x7fa").expect("a line"), "a");
    }

    #[test]
    fn leaving_ends_the_command_and_too_much_is_refused() {
        assert!(matches!(typed("BT1\x03"), Err(CliError::Interrupted(_))));
        assert!(matches!(typed("\x04"), Err(CliError::Interrupted(_))));
        assert!(typed(&"x".repeat(TOKEN_BYTES_MAX + 1)).is_err());
    }
}
