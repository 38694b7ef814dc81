//! Compiles the wire contracts with protox (a protobuf compiler in Rust: nothing to install).

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let files = ["monitor.proto", "broker.proto", "peer.proto", "admin.proto"];
    let files: Vec<String> = files.iter().map(|file| format!("proto/{file}")).collect();
    for file in &files {
        println!("cargo:rerun-if-changed={file}");
    }
    let descriptors = protox::compile(&files, ["proto"])?;
    tonic_prost_build::configure().compile_fds(descriptors)?;
    Ok(())
}
